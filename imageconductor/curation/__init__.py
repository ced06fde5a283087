"""Curation: from raw video to shards of clips with tracks (section 2.2)."""
