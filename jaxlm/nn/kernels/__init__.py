"""What an accelerator (or this CPU) runs instead of a primitive's plain definition."""
