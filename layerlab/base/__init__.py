"""Files, errors, names, devices and provenance: what every other room stands on."""
