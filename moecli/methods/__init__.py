"""One idea from one paper per file: `moecli/methods/<kind>/<name>.py` is the stage `<kind>/<name>`."""
