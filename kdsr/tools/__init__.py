"""One module per subcommand of ``kdsr``."""
