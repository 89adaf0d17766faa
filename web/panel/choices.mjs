// What the nodes HSWQPlan and HSWQExport offer for these inputs.

export const CHOICES = {
  mode: ["scaled", "compatible"],
  format: ["scaled", "scaled, convs too", "compatible", "original V2"],
  what: ["full checkpoint", "diffusion model only"],
};
