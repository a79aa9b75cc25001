"""What a run or a comparison has to say: tables for the terminal, pictures, and one HTML page.

It reads only the files of a run's folder, so a report can be written anew at any time and on any machine.
"""

from fedfuse.report.page import write_report as write_report
from fedfuse.report.partitions import partition_gallery as partition_gallery
from fedfuse.report.tables import board_markdown as board_markdown
from fedfuse.report.tables import print_board as print_board
from fedfuse.report.tables import print_result as print_result
