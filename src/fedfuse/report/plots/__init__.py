"""Pictures of a run or a comparison: each function returns a matplotlib figure and leaves nothing open."""

from fedfuse.report.plots.accuracy import accuracy_against_cost as accuracy_against_cost
from fedfuse.report.plots.accuracy import accuracy_by_method as accuracy_by_method
from fedfuse.report.plots.clients import client_bars as client_bars
from fedfuse.report.plots.confusion import confusion_matrix as confusion_matrix
from fedfuse.report.plots.costs import cost_bars as cost_bars
from fedfuse.report.plots.costs import exchange_bars as exchange_bars
from fedfuse.report.plots.curves import learning_curves as learning_curves
from fedfuse.report.plots.holdings import who_holds_what as who_holds_what
from fedfuse.report.plots.images import drawing_sheet as drawing_sheet
from fedfuse.report.plots.images import image_sheet as image_sheet
from fedfuse.report.plots.settings import accuracy_against_setting as accuracy_against_setting
from fedfuse.report.plots.style import save_figure as save_figure
