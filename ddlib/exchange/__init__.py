"""What a reader sees: published figures, tables, plots, claims, pages."""
