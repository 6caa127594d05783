"""Data: files to rows, rows to conversations, conversations to tokens and masks."""
