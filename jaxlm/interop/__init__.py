"""Load, save and convert models in the formats of other libraries."""
