"""How fast it is: random data, timed windows, records that can be compared. Uses all other rooms, none uses it."""
