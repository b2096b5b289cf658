"""The two templates: in which order row tiles are visited, and in which physical layout."""
