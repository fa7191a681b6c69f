"""What a run did, for people: tables for the terminal, plots and one self-contained page."""
