"""Drawing primitives that know nothing of clipkit: HTML, SVG curves, thumbnails, terminals."""
