"""From places to rows: folders, files, tables, the Hub."""
