"""Pages for people: the report on one experiment or two, the page to ask."""
