// Rules for web/, the panel's plain JavaScript. `npm run lint` asks them and Prettier.

import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: [".*/", "node_modules/"] }, // what development sets up
  js.configs.recommended,
  {
    files: ["web/**/*.{js,mjs}"],
    languageOptions: { globals: globals.browser },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      complexity: ["error", 8],
      eqeqeq: "error",
      "max-lines": ["error", 300],
      "max-lines-per-function": ["error", 45], // a view has a line for each element
      "no-multi-assign": "error",
      "no-nested-ternary": "error",
      "no-sequences": "error",
      "no-shadow": "error",
      "no-var": "error",
      "one-var": ["error", "never"],
      "prefer-const": "error",
    },
  },
];
