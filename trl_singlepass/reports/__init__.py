"""Reports for people: the inspection of a conversation, the audit of a dataset, plots, and HTML pages."""
