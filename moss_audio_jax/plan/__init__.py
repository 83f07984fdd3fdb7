"""Does a run fit a TPU slice, and how fast would it be? The TPU compiler answers without a TPU."""
