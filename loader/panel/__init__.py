"""What the panel asks and is told: routes, and what they know of each model."""
