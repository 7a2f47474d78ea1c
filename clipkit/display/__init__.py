"""Drawing primitives that know nothing of clipkit: HTML, SVG, plots, terminal output."""
