"""Writing and verifying data sets: archives, folders and TFRecords to ArrayRecord."""
