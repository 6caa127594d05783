"""Update rules over codecs: one file per family."""
