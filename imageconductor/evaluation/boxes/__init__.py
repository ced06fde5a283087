"""An evaluation of SMCD's kind: objects follow boxes."""
