"""Modifiers: what is done to a gradient before a rule sees it, or to the step that it makes of it.

One file for the contract, one for how a rule is modified, and one for each kind of modifier.
"""
