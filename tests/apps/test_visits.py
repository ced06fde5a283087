"""What one visitor has, and when it goes."""

import time

import pytest

from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.visits import Visits


class Ticket:
    stopped = False

    def stop(self):
        self.stopped = True


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def visits(tmp_path, clock):
    return Visits(tmp_path, Limits(visit_seconds=100, visits=3), lambda: clock[0])


def test_visitors_have_folders_of_their_own_which_go_after_a_while(visits, clock):
    first, second = visits.find("a"), visits.find("b")
    assert first.folder != second.folder
    assert visits.find("a") is first
    clock[0] = 90
    visits.find("b")
    clock[0] = 150
    third = visits.find("c")
    assert (first.folder.exists(), second.folder.exists(), third.folder.exists()) == (False, True, True)
    assert len(visits) == 2
    visits.close()
    assert not second.folder.exists()


def test_files_go_though_nobody_comes(visits, clock):
    folder = visits.find("a").folder
    visits.watch(0.01)
    clock[0] = 101
    until = time.monotonic() + 30
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not folder.exists()
    visits.close()


def test_who_waits_for_a_video_is_kept(visits, clock):
    visit, ticket = visits.find("a"), Ticket()
    visit.begin(ticket)
    clock[0] = 1000
    for other in "bcdef":
        visits.find(other)
    assert visits.find("a") is visit
    assert not ticket.stopped
    visit.end(ticket)


def test_of_many_visitors_the_latest_are_kept(visits, clock):
    folders = []
    for n, key in enumerate("abcd"):
        clock[0] = n
        folders.append(visits.find(key).folder)
    assert [folder.exists() for folder in folders] == [False, True, True, True]


def test_leaving_stops_what_runs_of_this_visitor_alone(visits):
    mine, theirs = Ticket(), Ticket()
    visits.find("a").begin(mine)
    visits.find("b").begin(theirs)
    visits.leave("a")
    visits.leave("unknown")
    assert (mine.stopped, theirs.stopped) == (True, False)


def test_a_request_without_a_session_and_a_result_that_is_gone(visits):
    with pytest.raises(ValueError, match="without a session"):
        visits.find(None)
    with pytest.raises(FieldError, match="make a video first"):
        visits.find("a").result(0)
    with pytest.raises(FieldError, match="no longer kept"):
        visits.find("a").result(7)
