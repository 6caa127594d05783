"""Rules that divide a step by its size: of rows, of columns, of singular values."""
