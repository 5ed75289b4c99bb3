"""Pages and plots that need nothing from anywhere: HTML and SVG as text."""
