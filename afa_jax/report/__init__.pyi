from .comparison import write_comparison as write_comparison
from .maps import draw_maps as draw_maps
from .readme import update_tables as update_tables
from .run_page import write_run_page as write_run_page
from .sheet import labelled_grid as labelled_grid
