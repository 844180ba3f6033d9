"""The command line, and the plugin that `layerlab new` copies."""
