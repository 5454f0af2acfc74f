"""Which models share which devices: step tables, estimators and the search. Pure, but for what reads files."""
