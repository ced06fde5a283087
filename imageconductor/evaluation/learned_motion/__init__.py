"""An evaluation of MotionDirector's kind: videos repeat a motion that was learned from reference clips."""
