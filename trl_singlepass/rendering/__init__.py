"""Messages to samples: each prompt as it is served, each completion as it is generated."""
