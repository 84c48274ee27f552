"""The report in a real Chromium, where Debian's `chromium` and `chromium-driver` are installed."""
import json
import shutil
import sys
import time
import urllib.error
import urllib.request

import pytest
from report_folders import PROMPTS, write_run

import runs
from jaxalign.errors import UserError
from jaxalign.reports import live, page

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

sys.path.append(str(runs.ROOT / "tests" / "votes"))
from test_vote_page import make_driver, until  # noqa: E402

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reports")
  one = write_run(folder / "sound")
  two = write_run(folder / "cheat", gain=0.6, judge=-0.2, collapse=0.7, seed=1)
  page.write_report([one], folder / "one.html")
  page.write_report([one, two], folder / "two.html")
  return folder


@pytest.fixture(scope="module")
def driver():
  driver = make_driver()
  yield driver
  driver.quit()


@pytest.fixture
def opened(pages, driver):
  driver.get(f"file://{pages / 'one.html'}")
  driver.get_log("browser")
  yield driver
  assert not driver.get_log("browser")


def visible(driver):
  return [card for card in driver.find_elements(By.CLASS_NAME, "pair") if card.is_displayed()]


def gains(driver, of="reward"):
  values = [json.loads(card.get_attribute(f"data-{of}")) for card in visible(driver)]
  return [v[-1] - v[0] for v in values]


@needs_browser
def test_sorting_and_more(opened):
  assert len(visible(opened)) == 12
  largest = gains(opened)
  assert largest == sorted(largest, reverse=True)
  order = Select(opened.find_element(By.ID, "sort"))
  order.select_by_value("loss")
  assert gains(opened) == sorted(gains(opened)) and max(gains(opened)) < min(largest)
  order.select_by_value("judge")
  assert gains(opened, "judge") == sorted(gains(opened, "judge"))
  order.select_by_value("prompt")
  assert [c.find_element(By.CLASS_NAME, "prompt").text for c in visible(opened)[::4]] == PROMPTS[:3]
  opened.find_element(By.ID, "more").click()
  assert len(visible(opened)) == 32
  assert not opened.find_element(By.ID, "more").is_displayed()
  # A keyboard goes on where the new ones begin.
  assert opened.switch_to.active_element == visible(opened)[12].find_element(By.TAG_NAME, "input")


@needs_browser
def test_the_slider_by_keyboard_and_by_pointer(opened):
  card = visible(opened)[0]
  frame, slider = card.find_element(By.CLASS_NAME, "frame"), card.find_element(By.TAG_NAME, "input")
  at = lambda: opened.execute_script(
      "return getComputedStyle(arguments[0].querySelector('.right')).clipPath", frame)
  before = at()
  assert "50%" in before and slider.get_attribute("aria-label").startswith("Before and after: ")
  slider.send_keys(Keys.END)
  assert "100%" in at()
  assert slider.get_attribute("aria-valuetext") == "100 % base, the rest tuned"
  slider.send_keys(Keys.HOME)
  assert "100%" not in at() and at() != before
  webdriver.ActionChains(opened).move_to_element_with_offset(frame, 40, 0).click().perform()
  assert slider.get_attribute("value") not in ("0", "50", "100")
  # All at once.
  everything = opened.find_element(By.ID, "all")
  everything.send_keys(Keys.HOME)
  assert {c.find_element(By.TAG_NAME, "input").get_attribute("value")
          for c in visible(opened)} == {"0"}


@needs_browser
def test_any_two_of_several_runs(pages, driver):
  driver.get(f"file://{pages / 'two.html'}")
  sides = [Select(driver.find_element(By.ID, side)) for side in ("left", "right")]
  assert [s.first_selected_option.text for s in sides] == ["base", "cheat"]
  sides[0].select_by_visible_text("sound")
  tags = lambda: [visible(driver)[0].find_element(By.CLASS_NAME, f"is-{side}").text
                  for side in ("left", "right")]
  assert tags() == ["sound", "cheat"]
  values = [json.loads(c.get_attribute("data-reward")) for c in visible(driver)]
  found = [v[2] - v[1] for v in values]
  assert found == sorted(found, reverse=True)


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (768, 1024)])
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_desk_and_a_phone_in_light_and_dark(opened, width, height, dark):
  opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
      "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 1000})
  opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
      {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
  try:
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    picture = visible(opened)[0].find_element(By.CLASS_NAME, "frame").rect
    assert picture["width"] >= 0.7 * min(width, 300)
    light = lambda colour: sum(map(float, colour.split("(")[1].split(")")[0].split(",")[:3])) / 765
    of = lambda name, key: light(opened.find_element(By.TAG_NAME, name).value_of_css_property(key))
    paper, ink = of("body", "background-color"), of("h1", "color")
    assert (paper < 0.2 and ink > 0.8) if dark else (paper > 0.8 and ink < 0.2)
    for button in ("sort", "more"):
      assert opened.find_element(By.ID, button).rect["height"] >= 40       # a thumb's width
  finally:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_a_screen_reader_hears_what_matters(opened):
  nodes = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
  unnamed = [n for n in nodes if n.get("role", {}).get("value") in ("button", "image", "slider")
             and not n["ignored"] and not n.get("name", {}).get("value")]
  assert not unnamed
  roles = [n["role"]["value"] for n in nodes if "role" in n]
  assert roles.count("slider") == 13 and roles.count("heading") >= 6


@needs_browser
def test_live_renews_itself(tmp_path, driver):
  folder = write_run(tmp_path / "going", finished=False)
  with live.serving([folder], 0) as port:
    driver.get(f"http://127.0.0.1:{port}/")
    # In one call: the page may be another one between finding an element and reading it.
    kicker = lambda: driver.execute_script(
        "return (document.querySelector('.kicker') || {}).textContent || ''")
    assert "step 4 of" in kicker()
    with (folder / "metrics.jsonl").open("a") as file:
      file.write('{"step": 5, "seconds": 9.0, "train/reward": 0.5}\n')
    until(lambda: "step 5 of" in kicker())
  driver.get("about:blank")


def test_live_shows_the_page_and_nothing_else(tmp_path):
  folder = write_run(tmp_path / "going", finished=False)
  with live.serving([folder], 0) as port:
    ask = lambda path, **headers: urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=5)
    first = ask("/stamp").read()
    text = ask("/").read().decode()
    assert f'data-stamp="{first.decode()}"' in text and "connect-src 'self'" in text
    time.sleep(0.01)
    (folder / "evaluations" / "watch.npz").touch()
    assert ask("/stamp").read() != first
    for path, headers in (("/config.json", {}), ("/../config.json", {}), ("/stamp/..", {}),
                          ("/", {"Host": "evil.example"})):
      with pytest.raises(urllib.error.HTTPError) as error:
        ask(path, **headers)
      assert error.value.code in (403, 404)
    with pytest.raises(UserError, match="--port="):
      with live.serving([folder], port):
        pass
  with pytest.raises(UserError, match="no folder of a run"):
    with live.serving([tmp_path], 0):
      pass
