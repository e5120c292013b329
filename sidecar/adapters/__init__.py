"""One module for each thing outside the process; they do not know each other, and third-party names stop here."""
