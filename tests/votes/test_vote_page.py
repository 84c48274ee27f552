"""The page in a real Chromium, where Debian's `chromium` and `chromium-driver` are installed."""
import shutil
import time

import pytest

from jaxalign.votes.store import read_events

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver")
SECRET = "s" * 32
EVIL = '<img src=x onerror="document.title=\'broken\'"><script>document.title="broken"</script>'


def make_driver(width=1280, height=800, dark=False):
  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which("chromium")
  for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
               f"--window-size={width},{height}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(
      options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
  driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
      "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
  driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
      {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
  return driver


@pytest.fixture(scope="module")
def driver():
  driver = make_driver()
  yield driver
  driver.quit()


def until(check, seconds=15):
  end = time.monotonic() + seconds
  while not (value := check()):
    assert time.monotonic() < end, "never came true"
    time.sleep(0.03)
  return value


def at(driver, text):
  until(lambda: driver.find_element(By.ID, "count").text == text
        and "busy" not in driver.find_element(By.TAG_NAME, "body").get_attribute("class"))


def press(driver, *keys):
  driver.find_element(By.TAG_NAME, "body").send_keys(*keys)


@pytest.fixture
def opened(make_vote, driver):
  with make_vote([EVIL, "p1", "p2", "p3", "p4"], repeats=0).served({"ann": SECRET}) as (
      client, ballot):
    driver.get(str(client.base_url.join(f"/v/{SECRET}/")))
    at(driver, "0 of 5")
    driver.get_log("browser")                                # what earlier tests left
    yield driver, ballot
  driver.get("about:blank")


def test_by_keyboard_alone(opened):
  driver, ballot = opened
  for k, (key, choice) in enumerate([
      (Keys.ARROW_LEFT, "left"), (Keys.ARROW_RIGHT, "right"), (Keys.ARROW_UP, "equal"),
      (Keys.ARROW_DOWN, "both_bad")]):
    press(driver, key)
    at(driver, f"{k + 1} of 5")
    assert [ask.choice for ask in ballot.answers()][-1] == choice
  press(driver, Keys.BACKSPACE)
  at(driver, "3 of 5")
  press(driver, Keys.ARROW_LEFT)
  at(driver, "4 of 5")
  # Tab reaches the buttons, Enter presses them.
  driver.execute_script("document.activeElement.blur()")
  press(driver, Keys.TAB)
  assert driver.switch_to.active_element.get_attribute("id") == "left"
  driver.switch_to.active_element.send_keys(Keys.ENTER)
  at(driver, "5 of 5")
  assert driver.find_element(By.ID, "thanks").text == "All your votes are saved."
  assert [ask.choice for ask in ballot.answers()] == ["left", "right", "equal", "left", "left"]


def test_by_mouse_with_zoom_and_undo(opened):
  driver, ballot = opened
  driver.find_element(By.CSS_SELECTOR, ".zoom[data-side=right]").click()
  large = driver.find_element(By.ID, "large")
  assert large.get_attribute("open") and driver.find_element(By.ID, "large-name").text == (
      "Second picture")
  source = driver.find_element(By.ID, "large-image").get_attribute("src")
  assert source == driver.find_element(By.CSS_SELECTOR, "#right img").get_attribute("src")
  press(driver, Keys.ARROW_LEFT)
  assert driver.find_element(By.ID, "large-name").text == "First picture"
  assert not ballot.answers()                                 # arrows compare here, vote elsewhere
  press(driver, Keys.ESCAPE)
  until(lambda: not large.get_attribute("open"))
  driver.find_element(By.ID, "right").click()
  at(driver, "1 of 5")
  shown = driver.find_element(By.ID, "prompt").text
  driver.find_element(By.ID, "undo").click()
  at(driver, "0 of 5")
  assert driver.find_element(By.ID, "prompt").text != shown
  driver.find_element(By.ID, "both_bad").click()
  at(driver, "1 of 5")
  assert driver.find_element(By.ID, "prompt").text == shown
  assert [ask.choice for ask in ballot.answers()] == ["both_bad"]


def test_prompts_are_shown_as_text_and_nothing_comes_from_elsewhere(opened):
  driver, _ = opened
  prompts = []
  for k in range(5):
    prompts.append(driver.find_element(By.ID, "prompt").text)
    press(driver, Keys.ARROW_LEFT)
    at(driver, f"{k + 1} of 5")
  assert EVIL in prompts and driver.title == "Which picture is better?"
  assert not driver.get_log("browser")
  origin = driver.execute_script("return location.origin")
  loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
  assert loaded and all(name.startswith(origin) for name in loaded)


def test_a_screen_reader_hears_what_matters(opened):
  driver, _ = opened
  nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
  named = {(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if "role" in n}
  for role, name in (("button", "Prefer the first picture"),
                     ("button", "Prefer the second picture"),
                     ("button", "Enlarge the first picture"), ("progressbar", "Votes given"),
                     ("heading", driver.find_element(By.ID, "prompt").text)):
    assert (role, name) in named
  unnamed = [n for n in nodes if n.get("role", {}).get("value") in ("button", "image")
             and not n["ignored"] and not n.get("name", {}).get("value")]
  assert not unnamed
  assert "1 of 5" in driver.execute_script("return document.getElementById('said').textContent")


def test_a_vote_waits_for_a_server_that_is_away(opened):
  driver, ballot = opened
  driver.execute_cdp_cmd("Network.enable", {})
  driver.execute_cdp_cmd("Network.emulateNetworkConditions", {
      "offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})
  press(driver, Keys.ARROW_RIGHT)
  until(lambda: "Not saved yet" in driver.find_element(By.ID, "error").text)
  assert not ballot.answers()
  driver.execute_cdp_cmd("Network.emulateNetworkConditions", {
      "offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})
  at(driver, "1 of 5")
  assert not driver.find_element(By.ID, "error").is_displayed()
  assert [ask.choice for ask in ballot.answers()] == ["right"]


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (844, 390), (768, 1024)])
def test_everything_is_in_view(opened, width, height):
  """On a desk, a phone upright and lying, a tablet: no scrolling, both pictures alike and large."""
  driver, _ = opened
  driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
      "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 1000})
  try:
    driver.execute_script("document.getElementById('prompt').textContent = 'a red fox in snow'")
    box = lambda name: driver.find_element(By.ID, name).rect
    left, right = box("left"), box("right")
    for side in ("width", "height"):
      assert left[side] == pytest.approx(right[side], abs=2)
    assert min(left["width"], left["height"]) > 0.4 * min(width, height)
    for name in ("left", "right", "undo", "equal", "both_bad", "prompt"):
      r = box(name)
      assert r["x"] >= 0 and r["y"] >= 0
      assert r["x"] + r["width"] <= width + 1 and r["y"] + r["height"] <= height + 1, name
      assert name == "prompt" or r["height"] >= 40           # a thumb's width
  finally:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False})


def test_votes_are_on_disk_before_the_next_pair_shows(make_vote, driver):
  made = make_vote(repeats=0)
  with made.served({"ann": SECRET}) as (client, _):
    driver.get(str(client.base_url.join(f"/v/{SECRET}/")))
    at(driver, "0 of 3")
    for k in range(1, 4):
      press(driver, Keys.ARROW_RIGHT)
      at(driver, f"{k} of 3")
      assert sum(event["event"] == "vote" for event in read_events(made.folder)) == k
  driver.get("about:blank")
