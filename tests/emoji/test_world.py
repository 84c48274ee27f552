"""The world of 64 pixels: drawings, scenes, captions, signs, latents, words and the reader."""
import hashlib
import io
import json
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

import worlds
from jaxalign.emoji import artwork, latents, reader, scenes, signs, words
from jaxalign.emoji.colours import COLOURS, RGB
from jaxalign.errors import UserError

ALL = list(scenes.SUBJECTS.values())


@pytest.fixture(scope="module")
def drawings():
  return worlds.drawings()


@pytest.fixture(scope="module")
def table():
  return scenes.table(worlds.NAMES, np.ones((4, 12), bool))


def pictures(drawings, table, number=200, seed=0):
  """Random scenes, in words and drawn."""
  drawn = scenes.draw(table, jax.random.key(seed), number)
  sheets = scenes.Sheets.of(drawings.take(slice(0, 4)))
  said = [table.scene(int(row), int(colour), worlds.NAMES, artwork.STYLES[int(style)])
          for row, colour, style in zip(drawn.row, drawn.colour, drawn.style)]
  return said, np.asarray(scenes.render(sheets, table, drawn)), drawn


# --- drawings -----------------------------------------------------------------------------------


def tarball(path, package, codes, entries=()):
  """An npm package with one red square for each code point."""
  picture = io.BytesIO()
  Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(picture, "PNG")
  with tarfile.open(path, "w:gz") as tar:
    def add(name, content):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
    for code in codes:
      add(f"{package.folder}{code}.png", picture.getvalue())
    if entries:
      add("package/emoji.json", json.dumps(entries).encode())
  return package._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_drawings_are_matched_by_code_point(tmp_path):
  entry = lambda code, category: {"unified": code, "short_name": f"NAME_{code}",
                                  "category": category}
  entries = [entry("2764-FE0F", "Activities"), entry("1F431", "Activities"),
             entry("1F600", "People & Body"), entry("1F999", "Activities")]
  lists = {"noto": ["2764-fe0f", "1f431", "1f600", "1f999"], "twemoji": ["2764-fe0f", "1f431"],
           "3d": ["2764", "1f431", "1f600"]}
  packages, paths = {}, {}
  for style, codes in lists.items():
    paths[style] = tmp_path / f"{style}.tgz"
    packages[style] = tarball(paths[style], artwork.PACKAGES[style], codes,
                              entries if style == "noto" else ())
  made = artwork.read_tarballs(paths, packages)
  assert list(made.codes) == ["2764", "1f431"] and made.names[0] == "name 2764 fe0f"
  assert made.large.shape == (3, 2, 60, 60, 4) and made.small.shape == (3, 2, 28, 28, 4)
  assert (made.small == (255, 0, 0, 255)).all()
  np.savez(tmp_path / "artwork.npz", **made._asdict())
  np.testing.assert_array_equal(artwork.load(tmp_path / "artwork.npz").large, made.large)
  assert list(made.of(["1f431"]).codes) == ["1f431"]
  with pytest.raises(UserError, match="no drawing of 1f999"):
    made.of(["1f999"])
  with pytest.raises(UserError, match="checksum"):
    artwork.read_tarballs(paths)
  with pytest.raises(UserError, match="not a file of drawings"):
    artwork.load(tmp_path / "none.npz")


# --- captions -----------------------------------------------------------------------------------


def test_captions_are_english():
  say = scenes.caption
  assert say(scenes.Scene(("owl",), 1, "", "orange")) == "an owl on an orange background"
  assert say(scenes.Scene(("unicorn",), 1, "", "red", "3d")) == (
      "a unicorn on a red background, 3d style")
  assert say(scenes.Scene(("strawberry",), 3, "", "pink")) == (
      "three strawberries on a pink background")
  assert say(scenes.Scene(("cat", "airplane"), 1, "left", "blue")) == (
      "a cat to the left of an airplane on a blue background")
  many = {name: scenes.plural(name) for name in ALL}
  assert many["mouse"] == "mice" and many["fish"] == "fish" and many["bus"] == "buses"
  assert many["butterfly"] == "butterflies" and many["monkey"] == "monkeys"
  assert many["peach"] == "peaches" and many["fox"] == "foxes" and many["cactus"] == "cacti"
  assert len(set(many.values())) == len(ALL) == 99


def test_a_caption_reads_back_as_its_scene():
  table = scenes.table(ALL[::7], np.ones((len(ALL[::7]), 12), bool), lambda scene: True)
  for row in range(0, len(table.first), 3):
    for style in ("", *artwork.STYLES):
      scene = table.scene(row, row % 12, ALL[::7], style)
      assert scenes.parse(scenes.caption(scene)) == scene
  for wrong in ("a cat", "a cat on a mauve background", "two cat on a red background",
                "a cat above a cat on a red background", "a yeti on a red background"):
    with pytest.raises(UserError, match="no scene"):
      scenes.parse(wrong)


def test_every_word_is_a_token():
  tokenizer, longest = words.tokenizer(), 0
  for word in words.vocabulary():
    assert (tokenizer([word])[0] != tokenizer.eos_id).sum() == 2, word     # with the start
  table = scenes.table(["fire engine", "light bulb"], np.ones((2, 12), bool), lambda scene: True)
  for row in range(len(table.first)):
    text = scenes.caption(table.scene(row, 7, ["fire engine", "light bulb"], "3d"))
    longest = max(longest, (tokenizer([text])[0] != tokenizer.eos_id).sum() + 1)
  assert longest == 20 <= tokenizer.length


# --- what is held out ---------------------------------------------------------------------------


def test_shares_that_are_held_out():
  held = lambda *scene: scenes.held_out(scenes.Scene(*scene))
  colour = np.mean([bool(held((name,), 1, "", c)) for name in ALL for c in COLOURS])
  number = np.mean(["number" in held((name,), k, "", "red") for name in ALL for k in (2, 3, 4)])
  pair = np.mean(["pair" in held((a, b), 1, "left", "red") for a in ALL[:40] for b in ALL[:40]
                  if a != b])
  np.testing.assert_allclose([colour, number, pair], [0.15, 0.20, 0.30], atol=0.03)
  # Turned round, a pair is the same picture.
  for a, b in zip(ALL[:30], ALL[30:60]):
    assert held((a, b), 1, "left", "red") == held((b, a), 1, "right", "red")
    assert held((a, b), 1, "above", "red") == held((b, a), 1, "below", "red")
  assert held(("cat",), 1, "", "red") == held(("cat",), 1, "", "red")


def test_training_never_draws_what_is_held_out(drawings, table):
  said, _, drawn = pictures(drawings, table, 500)
  assert not any(scenes.held_out(scene) for scene in said)
  kinds = np.digitize(drawn.row, table.starts[1:-1])
  np.testing.assert_allclose(np.bincount(kinds) / 500, [0.3, 0.3, 0.4], atol=0.08)
  assert 0.5 < drawn.large[kinds == 0].mean() < 0.8 and not drawn.large[kinds > 0].any()


# --- pictures -----------------------------------------------------------------------------------


def test_a_scene_shows_what_its_caption_says(drawings, table):
  said, images, _ = pictures(drawings, table)
  readings = reader.Reader(drawings.take(slice(0, 4)), worlds.NAMES)(images)
  for scene, reading in zip(said, readings):
    assert all(reader.check(scene, reading).values()), (scene, reading)


def test_a_drawing_stands_where_it_should(drawings):
  sheets = scenes.Sheets.of(drawings)
  empty = 3 * len(worlds.CODES)
  image = np.asarray(scenes.compose(sheets, np.array([empty, 1]), np.array(
      [[empty, 2, empty, empty]] * 2), RGB[:2]))
  np.testing.assert_allclose(image[0, :32, :32], 1.0)
  np.testing.assert_allclose(image[0, 2:30, 34:62][5, 5], drawings.small[0, 2, 5, 5, :3] / 255)
  np.testing.assert_allclose(image[0, 32:], 1.0)
  np.testing.assert_allclose(image[1, 2:62, 2:62][20, 20], drawings.large[0, 1, 20, 20, :3] / 255)
  np.testing.assert_allclose(image[1, :2], np.broadcast_to(RGB[1], (2, 64, 3)), rtol=1e-6)


def test_contrast_refuses_a_drawing_of_the_background_s_colour():
  art = worlds.drawings().take([0, 1])
  for sheet in (art.large, art.small):
    sheet[:, 0, ..., :3] = (214, 48, 49)
    sheet[:, 1, ..., :3] = (9, 100, 227)
  seen = scenes.contrast(art)
  assert not seen[0, COLOURS.index("red")] and seen[0, COLOURS.index("blue")]
  assert not seen[1, COLOURS.index("blue")] and seen[1, COLOURS.index("red")]


# --- the reader ---------------------------------------------------------------------------------


def test_the_reader_says_which_part_is_wrong(drawings):
  art = drawings.take(slice(0, 4))
  sheets, read = scenes.Sheets.of(art), reader.Reader(art, worlds.NAMES)
  a, b, empty = 0, 1, 12
  red = RGB[[COLOURS.index("red")]]
  see = lambda *quarters, alone=empty: read(np.asarray(scenes.compose(
      sheets, np.array([alone]), np.array([quarters]), red)))[0]
  first, second = worlds.NAMES[:2]
  pair = scenes.Scene((first, second), 1, "left", "red", "noto")
  wrong = lambda scene, seen: [part for part, ok in reader.check(scene, seen).items() if not ok]
  assert wrong(pair, see(a, b, empty, empty)) == []
  assert wrong(pair, see(empty, empty, a, b)) == []
  assert wrong(pair, see(b, a, empty, empty)) == ["place"]
  assert wrong(pair, see(a, empty, b, empty)) == ["place"]
  assert wrong(pair, see(a, empty, empty, b)) == ["place"]
  assert wrong(pair, see(a, a, empty, empty)) == ["subjects", "place"]
  assert wrong(pair, see(a, b, b, empty)) == ["number", "place"]
  assert wrong(pair, see(a, b + 4, empty, empty)) == ["style"]
  assert wrong(pair._replace(colour="blue"), see(a, b, empty, empty)) == ["colour"]
  three = scenes.Scene((first,), 3, "", "red")
  assert wrong(three, see(a, a, empty, a)) == []
  assert wrong(three, see(a, a, a, a)) == wrong(three, see(0, 0, 0, 0, alone=a)) == ["number"]
  assert wrong(three, see(a, a, b, empty)) == ["subjects"]


def test_what_is_no_drawing_is_unreadable(drawings):
  art = drawings.take(slice(0, 4))
  noise = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)
  noise[:, :2] = noise[:, -2:] = noise[:, :, :2] = noise[:, :, -2:] = RGB[0]
  for reading in reader.Reader(art, worlds.NAMES)(noise):
    assert set(reading.places) == {"?"}
    assert not reader.check(scenes.Scene((worlds.NAMES[0],), 1, "", "white"), reading)["subjects"]


# --- signs and latents --------------------------------------------------------------------------


def test_signs_spell_their_words():
  glyphs = signs.letters()
  spelt = signs.spell(["CAT", "NO", "LION"])
  np.testing.assert_array_equal(spelt[1], [13, 14, -1, -1])
  red, white = RGB[COLOURS.index("red")], RGB[COLOURS.index("white")]
  shift = np.array([[0, 0], [1, -1], [0, 0]])
  image = np.asarray(signs.render(spelt, np.stack([red, white, red]), shift))
  for word, (down, right), picture, ground, ink in zip(
      spelt, shift, image, (red, white, red), (1.0, 0.08, 1.0)):
    length = (word >= 0).sum()
    left = 32 - 7 * length + right
    cover = np.concatenate(list(glyphs[word[:length]]), 1)[..., None]
    np.testing.assert_allclose(
        picture[22 + down:42 + down, left:left + 14 * length],
        ground * (1 - cover) + ink * cover, atol=1e-6)
    np.testing.assert_allclose(picture[0], np.broadcast_to(ground, (64, 3)), rtol=1e-6)
  assert signs.caption("CAT", "orange") == 'a sign that says "CAT" on an orange background'
  word, colour, moved = signs.draw(jax.random.key(0), 300)
  lengths = np.bincount((np.asarray(word) >= 0).sum(1), minlength=5)
  assert lengths[2:].min() > 70 and lengths[:2].sum() == 0
  assert set(np.asarray(colour)) == set(range(12)) and set(np.asarray(moved).ravel()) == {-1, 0, 1}


def test_latents_are_the_best_linear_map_of_patches(drawings, table):
  _, images, _ = pictures(drawings, table, 120)
  fitted = latents.fit(images)
  z = np.asarray(fitted.encode(images))
  assert z.shape == (120, 8, 8, 16)
  np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=2e-2)
  np.testing.assert_allclose(fitted.basis.T @ fitted.basis, np.eye(16), atol=1e-5)
  again = np.asarray(fitted.decode(z))
  np.testing.assert_allclose(fitted.encode(again), z, atol=1e-4)      # a projection
  shipped = latents.load()
  other = np.asarray(shipped.decode(shipped.encode(images)))
  assert np.square(again - images).mean() <= np.square(other - images).mean()


def test_shipped_latents_keep_signs_and_have_unit_size():
  word, colour, shift = signs.draw(jax.random.key(1), 64)
  images, fixed = np.asarray(signs.render(word, RGB[np.asarray(colour)], shift)), latents.load()
  z = fixed.encode(images)
  assert 0.8 < float(z.std()) < 1.3
  error = np.square(np.asarray(fixed.decode(z)).clip(0, 1) - images).mean((1, 2, 3))
  assert (-10 * np.log10(error)).mean() > 23
