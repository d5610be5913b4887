"""The command `mhc-compile doctor`: check the installation and say what to do."""
