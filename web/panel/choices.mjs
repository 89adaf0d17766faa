// What the nodes HSWQPlan and HSWQExport offer for these inputs.

export const CHOICES = {
  mode: ["scaled", "compatible"],
  format: ["scaled", "scaled, convs too", "compatible"],
  what: ["full checkpoint", "diffusion model only"],
};
