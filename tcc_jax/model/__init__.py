"""The decoder, its attention and its objectives. Knows shapes; knows no mesh and no files."""
