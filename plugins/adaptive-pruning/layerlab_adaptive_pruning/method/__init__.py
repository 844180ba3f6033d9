"""Networks rebuilt with fewer channels and layers: their structure and what is cut from it."""
