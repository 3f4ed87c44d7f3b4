"""Take the README's pictures of the page from a running server: `python docs/screenshots.py http://127.0.0.1:7860`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

LINES = ["hi ! what do you do for a living ?", "do you have any pets ?", "what is your favorite food ?"]
PERSONA = ["i work as a gardener in bristol .", "i have a cat called biscuit .", "i play the trumpet in a jazz band .",
           "my favorite food is mushroom soup .", ""]
SCREENS = {"desktop": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
           "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True,
                     "is_mobile": True}}

with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    for name, screen in SCREENS.items():
        page = browser.new_context(**screen).new_page()
        page.set_default_timeout(120_000)
        page.goto(sys.argv[1])
        page.wait_for_selector("body.ready")
        for number, sentence in enumerate(PERSONA):
            page.locator("#cards textarea").nth(number).fill(sentence)
        for number, line in enumerate(LINES, 1):
            page.locator("#message textarea").fill(line)
            page.locator("#message textarea").press("Enter")
            page.wait_for_function("number => document.querySelectorAll('#chat .bot-row').length === number && "
                                   "!document.body.classList.contains('busy')", arg=number)
        page.locator("#chips button").first.wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(__file__).with_name(f"demo-{name}.png"))
    browser.close()
