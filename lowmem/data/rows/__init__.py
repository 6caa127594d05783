"""From rows to conversations: fields, formats, columns, messages, templates."""
