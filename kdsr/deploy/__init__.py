"""Networks in use, without the options of their training: open a file, recognise it, export it, run it."""
