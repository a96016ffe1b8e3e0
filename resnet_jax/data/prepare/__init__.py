"""Writes and verifies data sets: archives, folders and TFRecords to ArrayRecord."""
