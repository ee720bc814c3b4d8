"""The specifications, a file for each task; importing them needs no torch."""
