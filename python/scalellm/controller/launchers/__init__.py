"""What starts engines: one interface (launcher.py), one file for each thing that implements it."""
