from .generate import Picture as Picture
from .generate import Request as Request
from .map_pictures import contact_sheet as contact_sheet
from .map_pictures import mean_maps as mean_maps
from .map_pictures import paint as paint
from .pictures import Pictures as Pictures
from .prompt_files import read_prompts as read_prompts
from .sample_many import sample_all as sample_all
