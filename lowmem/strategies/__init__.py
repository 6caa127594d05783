"""Named methods: one file each, found automatically."""
