"""The paper's evaluation: videos follow drawn trajectories of cameras and objects (Table 1, Figs. 5-7)."""
