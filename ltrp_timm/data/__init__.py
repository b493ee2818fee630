"""Pictures and labels of data sets."""
