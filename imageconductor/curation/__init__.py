"""Raw video -> shards of clips with tracks (section 2.2)."""
