/* The part of the page that runs in the browser. It keeps the current conversation and earlier ones; the server keeps none.

   Gradio's events call the functions of `page`. In a turn, `ask` sends the conversation to the server with a number,
   which comes back with the reply; `take_reply` takes the reply or an error, and ignores answers with an old number.
   Texts are put into the page as text, never as markup.
*/
const page = (() => {
  const KEPT = "transfertransfo:", MOST_SHARED = 256 * 1024, CARDS = 5, CHECK = 2000, SLOW_CHECK = 30000;
  let current = null;      // the conversation: id, persona, own, said (the user's first), thumbs, title, at
  let turn = 0;            // number of the last request
  let asking = null;       // the request under way: said, and the text that returns to the box if it fails
  let choosing = false;    // two replies wait for the user's choice
  let waiting = false;     // the user pressed Enter during a reply
  let following = false;   // the address changes with the conversation
  let recalled = null;     // how many of the user's messages back the box shows
  let lost = null;         // timer that looks for a lost server
  let started = false;

  // ------------------------------------------------------------------------------------------------ small helpers

  const find = selector => document.querySelector(selector);
  const box = () => find("#message textarea");
  const button = id => find(`button#${id}, #${id} button`);
  const cards = () => [...document.querySelectorAll("#cards textarea")];
  const lines = text => text.split("\n").map(line => line.trim()).filter(Boolean);
  const persona = () => cards().flatMap(card => lines(card.value));
  const own = () => lines(find("#own textarea")?.value ?? current.own.join("\n"));
  const busy = () => asking !== null || choosing;
  const send_if_waiting = () => { if (waiting) setTimeout(send); waiting = false; };
  // Gradio's chat reads texts as markup: an invisible character behind these two prevents this.
  const hide = text => text.replace(/[<&]/g, "$&\u2060"), plain = text => text.replace(/([<&])\u2060/g, "$1");
  const update = changes => ({__type__: "update", ...changes});

  function write(element, text) {
    if (!element || element.value === text) return;
    element.value = text;
    element.dispatchEvent(new Event("input", {bubbles: true}));
  }

  function make(tag, text, attributes = {}, act = null) {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (act) element.addEventListener("click", act);
    return element;
  }

  function notice(text, act = null, label = "") {
    const place = find("#notice [role]");
    place.replaceChildren();
    if (!text) return;
    place.append(make("span", text));
    if (act) place.append(make("button", label, {class: "small"}, () => { notice(""); act(); }));
    place.append(make("button", "✕", {class: "small", "aria-label": "Close this message"}, () => notice("")));
  }

  const messages = said => said.map((text, place) => (
    {role: place % 2 ? "assistant" : "user", content: [{type: "text", text: hide(text)}], metadata: null, options: null}));
  const thumbs = () => current.said.flatMap((_, place) => place % 2 ? [current.thumbs[place] ?? null] : []);
  const shown = said => update({value: messages(said), feedback_value: thumbs()});
  const show = () => button("show").click();

  // ---------------------------------------------------------------------------------- conversations, kept in the browser

  function saved_conversations() {
    const all = [];
    try {
      for (const key of Object.keys(localStorage)) {
        if (!key.startsWith(KEPT)) continue;
        try {
          const one = JSON.parse(localStorage[key]);
          if (is_conversation(one)) all.push(one);
        } catch { /* another program's entry */ }
      }
    } catch { /* the browser allows no storage */ }
    return all.sort((one, other) => other.at - one.at);
  }

  function is_conversation(one) {
    const texts = list => Array.isArray(list) && list.every(text => typeof text === "string");
    return one && typeof one.id === "string" && texts(one.persona) && texts(one.own) && texts(one.said)
      && typeof one.thumbs === "object" && one.thumbs !== null;
  }

  function save() {
    current.persona = persona();
    current.own = own();
    current.at = Date.now();
    try {
      if (current.said.length) localStorage[KEPT + current.id] = JSON.stringify(current);
      else localStorage.removeItem(KEPT + current.id);
      const draft = [asking?.text, box()?.value].filter(Boolean).join("\n");  // includes a message not answered yet
      sessionStorage[KEPT] = JSON.stringify({...current, draft, lost: lost !== null});
    } catch {
      notice("This browser cannot save the conversation; it is lost when you close the page. Export saves it to a file.");
    }
    list();
    if (following) address().then(where => history.replaceState(null, "", where));
  }

  function begin(sentences, said = [], mine = []) {
    stop();
    current = {id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), persona: sentences, own: mine, said,
           thumbs: {}, title: "", at: Date.now()};
    enter();
  }

  /** Show the current conversation. */
  function enter() {
    turn++;
    [asking, choosing, recalled] = [null, false, null];
    const rest = current.persona.slice(CARDS - 1).join("\n");
    cards().forEach((card, place) => write(card, place < CARDS - 1 ? current.persona[place] ?? "" : rest));
    write(find("#own textarea"), current.own.join("\n"));
    notice("");
    document.body.classList.remove("busy");
    show();
    save();
    hint();
    send_if_waiting();
  }

  function open(one) {
    if (asking) stop();
    if (one.id !== current.id) { following = false; history.replaceState(null, "", location.pathname + location.search); }
    current = {title: "", ...one};
    if (current.said.length % 2) write(box(), current.said.pop());  // a message that got no reply
    enter();
    drawer("");
  }

  function remove(one) {
    try { localStorage.removeItem(KEPT + one.id); } catch { /* the browser allows no storage */ }
    const back = () => {
      try { localStorage[KEPT + one.id] = JSON.stringify(one); } catch { /* the browser allows no storage */ }
      open(one);
    };
    if (one.id === current.id) begin(persona(), [], own());
    else list();
    notice("The conversation is deleted.", back, "Put it back");
  }

  function list() {
    const place = find("#conversations");
    if (!place || place.querySelector("input")) return;
    place.replaceChildren(...saved_conversations().map(one => {
      const title = one.title || one.said[0] || "Nothing said yet", item = make("li", "");
      item.append(make("button", title, {class: "small open", ...(one.id === current.id ? {"aria-current": "true"} : {})},
                       () => open(one)),
                  make("button", "✎", {class: "small", "aria-label": `Rename: ${title}`}, () => rename(one, item, title)),
                  make("button", "✕", {class: "small", "aria-label": `Delete: ${title}`}, () => remove(one)));
      return item;
    }));
    if (!place.children.length) place.append(make("li", "Conversations are kept in this browser.", {class: "faint"}));
  }

  function rename(one, item, title) {
    const field = make("input", "", {"aria-label": "Name of the conversation", maxlength: "80"});
    let over = false;  // removing the field also fires "blur"
    const done = keep => {
      if (over) return;
      over = true;
      const name = field.value.trim();
      field.remove();
      if (keep && name) {
        if (one.id === current.id) current.title = name;
        try { localStorage[KEPT + one.id] = JSON.stringify({...one, title: name}); } catch { /* the browser allows no storage */ }
      }
      list();
    };
    field.value = title;
    field.addEventListener("keydown", event => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
    });
    field.addEventListener("blur", () => done(true));
    item.firstChild.replaceWith(field);
    field.select();
  }

  // -------------------------------------------------------------------------------------------------------- a turn

  /** Ask for a reply to the last message of `said`. `text` goes back into the box if this fails. */
  function request(said, text) {
    if (busy()) return;
    turn++;
    asking = {said, text, failed: 0};
    recalled = null;
    document.body.classList.add("busy");
    notice("");
    chips([]);
    button("ask").click();
    watch();
  }

  function send() {
    const text = box().value.trim();
    if (!text) return;
    if (!current) { waiting = true; return; }  // the page is not ready yet
    if (choosing) return notice("Choose one of the two replies first; your message stays in the box.");
    if (asking) { waiting = true; return; }
    write(box(), "");
    request([...current.said, text], text);
  }

  /** Return what the event needs: the data for the server, the chat with the new message, and Stop instead of Send. */
  function ask() {
    return [JSON.stringify({turn, conversation: current.id, persona: persona(), said: asking.said}),
            update({value: messages(asking.said)}), update({submit_btn: false, stop_btn: "Stop"})];
  }

  function take_reply(outcome) {
    const answer = outcome ? JSON.parse(outcome) : {turn};
    if (answer.turn !== turn || !(asking || choosing)) return [update({}), update({})];
    const {text} = asking ?? {text: ""};
    if (answer.choosing) {
      [asking, choosing] = [null, true];
      return [update({}), update({submit_btn: "Send", stop_btn: false})];
    }
    [asking, choosing] = [null, false];
    document.body.classList.remove("busy");
    if (answer.said) {
      current.said = answer.said;
      for (const place of Object.keys(current.thumbs)) if (place >= current.said.length - 1) delete current.thumbs[place];
      notice(answer.note ?? "");
      send_if_waiting();
    } else {
      restore_text(text);
      notice(answer.error ?? "");
      waiting = false;
    }
    save();
    setTimeout(() => { look(); hint(); });
    return [shown(current.said), update({submit_btn: "Send", stop_btn: false})];
  }

  function restore_text(text) {
    const written = box().value;
    if (text && written.trim() !== text) write(box(), written.trim() ? `${text}\n${written}` : text);
  }

  /** End the turn of an event that the server did not answer. */
  function failed() {
    if (asking || choosing) {
      restore_text(asking?.text ?? "");
      [asking, choosing, waiting] = [null, false, false];
      turn++;
      document.body.classList.remove("busy");
      server_lost();
    }
    return [shown(current.said), update({submit_btn: "Send", stop_btn: false})];
  }

  function stop() {
    if (busy()) button("halt").click();
  }

  function retry() {
    if (current.said.length > 1) request(current.said.slice(0, -1), "");
  }

  function undo() {
    if (busy() || current.said.length < 2) return;
    restore_text(current.said.at(-2));
    current.said = current.said.slice(0, -2);
    delete current.thumbs[current.said.length + 1];
    save();
    show();
    hint();
    box().focus();
  }

  /** Ask for a new reply to a message that the user edited in the chat, and drop all messages after it. */
  function edit(chat) {
    const texts = chat.map(message => plain(message.content.map(part => part.text ?? "").join("")).trim());
    const place = texts.findIndex((text, place) => text !== current.said[place]?.trim());
    if (place < 0 || place % 2 || !texts[place]) return show();
    request(texts.slice(0, place + 1), texts[place]);
  }

  function clear() {
    remove({...current, said: [...current.said]});
  }

  function take_rating(rating) {
    if (rating) {
      const {place, liked, note} = JSON.parse(rating);
      current.thumbs[place] = liked === null ? null : liked ? "Like" : "Dislike";
      if (note) notice(note);
      save();
    }
    return update({feedback_value: thumbs()});
  }

  /** Begin a conversation with a personality that the server drew. */
  function take_persona(text) {
    const sentences = JSON.parse(text);
    if (!started) return start(sentences);
    const over = current.said.length > 0;
    begin(sentences, [], own());
    if (over) notice("This is a new conversation; the last one is in the list of conversations.");
  }

  // --------------------------------------------------------------------------- suggestions, and what the model sees

  function hint() {
    chips([], current.said.length ? "Suggestions are on their way …" : "");
    if (find("#suggests input")?.checked === false) return chips([], "");
    button("hint").click();
  }

  const conversation = () => JSON.stringify({turn, conversation: current.id, persona: persona(), own: own(), said: current.said});

  function take_suggestions(suggested) {
    if (!suggested) return;
    const {turn: number, texts} = JSON.parse(suggested);
    if (number === turn && !busy()) chips(texts);
  }

  function chips(texts, otherwise = "") {
    find("#chips")?.replaceChildren(...texts.map(text => make("button", text, {class: "small", title: text}, () => {
      write(box(), text);
      box().focus();
    })), ...(texts.length || !otherwise ? [] : [make("p", otherwise)]));
  }

  const visible = element => element && getComputedStyle(element).visibility === "visible";
  const look = () => { if (visible(find("#right"))) button("look").click(); };

  /** Show the first token of a new reply. */
  function choose_first_token() {
    const first = find("#seen button.token");
    if (first && !find("#seen button.token[aria-pressed=true]")) token(first);
  }

  /** Show the alternatives of a token of the reply, and mark the sentences of the personality that it draws on. */
  function token(chosen) {
    const seen = chosen.closest(".seen"), step = JSON.parse(chosen.dataset.step);
    for (const one of seen.querySelectorAll("button.token")) one.setAttribute("aria-pressed", one === chosen);
    seen.querySelectorAll(".sentence").forEach((one, place) => one.style.setProperty("--share", step.shares[place] ?? 0));
    seen.querySelector(".draws").textContent = step.summary;
    seen.querySelector("caption").textContent = `Alternatives to “${step.token}”: before and after temperature and filter`;
    seen.querySelector("tbody").replaceChildren(...step.alternatives.map(([word, before, after]) => {
      const row = make("tr", "", word === step.token ? {"aria-current": "true"} : {}), bars = make("td", "");
      row.append(make("th", word, {scope: "row"}));
      for (const share of [before, after]) {
        row.append(make("td", `${(100 * share).toFixed(1)}%`));
        const bar = make("div", "", {class: "bar"});
        bar.style.width = `${100 * share}%`;
        bars.append(bar);
      }
      row.append(bars);
      return row;
    }));
  }

  // ----------------------------------------------------------------------------------------------- sharing, exporting

  async function through(bytes, stream) {
    const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader(), parts = [];
    for (let size = 0; ;) {
      const {done, value} = await reader.read();
      if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
      if ((size += value.length) > MOST_SHARED) throw new Error("too long");
      parts.push(value);
    }
  }

  async function address() {
    const text = JSON.stringify({personality: persona(), own: own(), said: current.said});
    const packed = await through(new TextEncoder().encode(text), new CompressionStream("deflate"));
    const letters = btoa(Array.from(packed, byte => String.fromCharCode(byte)).join(""));
    return `${location.origin}${location.pathname}#${letters.replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "")}`;
  }

  async function shared(fragment) {
    const letters = atob(fragment.replace(/-/g, "+").replace(/_/g, "/"));
    const text = new TextDecoder().decode(await through(Uint8Array.from(letters, letter => letter.charCodeAt(0)),
                                                        new DecompressionStream("deflate")));
    const {personality, own: mine, said} = JSON.parse(text);
    if (!is_conversation({id: "", persona: personality, own: mine, said, thumbs: {}})) throw new Error("not a conversation");
    return [personality, said, mine];
  }

  async function share() {
    const where = await address();
    following = true;
    history.replaceState(null, "", where);
    let copied = true;
    try {
      await navigator.clipboard.writeText(where);
    } catch {  // without HTTPS, a page from another machine has no clipboard
      const field = make("textarea", where);
      document.body.append(field);
      field.select();
      copied = document.execCommand("copy");
      field.remove();
    }
    notice(copied ? "The address is copied. It holds the whole conversation and changes with it; the server keeps nothing."
                  : "Copy the address from the browser's address bar: it holds the whole conversation and changes with it.");
  }

  function download() {
    const turns = current.said.flatMap((text, place) => place % 2 ? [{history: current.said.slice(0, place), candidates: [text]}] : []);
    if (!turns.length) return notice("There is nothing to export yet; say something first.");
    const entry = {personality: persona(), utterances: turns};
    const text = JSON.stringify({train: [entry], valid: [entry]}, null, 1) + "\n";
    const link = make("a", "", {download: "conversation.json"});
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.click();
  }

  // --------------------------------------------------------------------------------------------------- a lost server

  async function alive() {
    try {
      const state = await fetch("healthz", {signal: AbortSignal.timeout(5000)});
      return state.status < 500 || (await state.json()).status !== "stopping";
    } catch {
      return false;
    }
  }

  function server_lost() {
    notice("The server cannot be reached. Your text and the conversation are kept; this page looks for it every two seconds.");
    if (lost) return;
    document.body.classList.add("lost");
    lost = setInterval(async () => {
      if (!await alive()) return;
      save();
      location.reload();  // Gradio sends no events any more; the conversation and the text in the box come back
    }, CHECK);
  }

  /** Look for the server after Enter: Gradio drops events without a word once its connection is lost. */
  const check_delivery = () => setTimeout(async () => {
    if (started && !busy() && box().value.trim() && !await alive()) server_lost();
  }, 300);

  /** While a reply is awaited, check that the server still runs. */
  async function watch() {
    const mine = turn;
    while (asking && turn === mine) {
      await new Promise(done => setTimeout(done, CHECK));
      if (!asking || turn !== mine) return;
      asking.failed = await alive() ? 0 : asking.failed + 1;
      if (asking?.failed > 1) {
        failed();
        return button("fail").click();  // resets the chat and the buttons, if Gradio still reacts
      }
    }
  }

  setInterval(async () => { if (started && !lost && !asking && !document.hidden && !await alive()) server_lost(); }, SLOW_CHECK);

  // ---------------------------------------------------------------------------------------------- the page as a whole

  function drawer(name) {
    for (const one of ["rest", "right"]) {
      document.body.classList.toggle(`show-${one}`, one === name);
      find(`[data-drawer=${one}]`)?.setAttribute("aria-expanded", one === name);
    }
    if (name) find(`#${name} .drawer-close`)?.focus();
    if (name === "right") setTimeout(look);
  }

  function set_dark(dark) {
    document.body.classList.toggle("dark", dark);
    find("#theme")?.setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
  }

  async function start(sentences) {
    started = true;
    apply_theme();
    const before = await before_reload(), fragment = location.hash.slice(1);
    setTimeout(() => {
      document.body.classList.add("ready");
      if (before?.lost) box().focus();
    }, 100);
    if (fragment) {
      try {
        begin(...await shared(fragment));
        following = true;
        return;
      } catch {
        history.replaceState(null, "", location.pathname + location.search);
        begin(sentences);
        return notice("This address holds no complete conversation; copy it again, whole.");
      }
    }
    if (!before) return begin(sentences);
    current = before;
    if (!box().value) write(box(), before.draft ?? "");
    enter();
    if (before.lost) notice("The server is back.");
  }

  async function before_reload() {
    try {
      const one = JSON.parse(sessionStorage[KEPT] ?? "null");
      return is_conversation(one) ? {title: "", ...one} : null;
    } catch {
      return null;
    }
  }

  const dark = () => document.body.classList.contains("dark");
  function apply_theme() {
    let chosen = null;
    try { chosen = localStorage["transfertransfo-theme"]; } catch { /* the browser allows no storage */ }
    set_dark(chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  }
  addEventListener("hashchange", () => location.reload());
  addEventListener("storage", () => started && list());
  addEventListener("pagehide", () => { if (started) save(); });
  addEventListener("offline", () => started && server_lost());

  document.addEventListener("click", event => {
    if (event.target.closest?.("#message .submit-button")) check_delivery();
    const clicked = event.target.closest?.("[data-act], [data-drawer], button.token");
    if (!clicked) return;
    if (clicked.matches(".token")) token(clicked);
    else if (clicked.dataset.drawer !== undefined) drawer(document.body.classList.contains(`show-${clicked.dataset.drawer}`)
                                                          ? "" : clicked.dataset.drawer);
    else { acts[clicked.dataset.act](); drawer(""); }
  });
  for (const kind of ["mouseover", "focusin"])
    document.addEventListener(kind, event => {
      const over = event.target.closest?.("button.token");  // the number in it, too
      if (over) token(over);
    });

  const acts = {
    share, download,
    renew: () => { begin(persona(), [], own()); box().focus(); },
    theme: () => {
      set_dark(!dark());
      try { localStorage["transfertransfo-theme"] = dark() ? "dark" : "light"; } catch { /* no storage */ }
    },
  };

  document.addEventListener("keydown", event => {
    if (event.key === "Escape") drawer("");
    if (event.key === "Enter" && event.target === box()) check_delivery();
    if (event.target !== box() || event.isComposing || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    const mine = current.said.filter((_, place) => place % 2 === 0), field = box();
    const back = (recalled ?? 0) + (event.key === "ArrowUp" ? 1 : -1);
    if (recalled === null ? field.value || event.key === "ArrowDown" : field.value !== (mine.at(-recalled) ?? "")) return;
    if (back > mine.length) return event.preventDefault();
    recalled = back > 0 ? back : null;
    write(field, recalled ? mine.at(-recalled) : "");
    event.preventDefault();
  });
  document.addEventListener("input", event => {
    if (event.target === box()) waiting = false;
  });
  document.addEventListener("change", event => {  // the cards and the user's personality belong to the conversation
    if (started && event.target.closest("#cards, #own")) save();
  });
  document.addEventListener("paste", event => {  // a pasted personality of several lines fills this card and the next ones
    const place = cards().indexOf(event.target), text = event.clipboardData?.getData("text") ?? "";
    if (place < 0 || event.target.value || lines(text).length < 2) return;
    event.preventDefault();
    const rest = lines(text);
    cards().slice(place).forEach((card, number, all) => {
      if (rest.length && (!number || !card.value || number === all.length - 1))
        write(card, number === all.length - 1 ? [...lines(card.value), ...rest.splice(0)].join("\n") : rest.shift());
    });
    save();
  });

  const copy = navigator.clipboard?.writeText.bind(navigator.clipboard);
  if (copy) navigator.clipboard.writeText = text => copy(plain(text));

  return {ask, take_reply, failed, send, stop, retry, undo, edit, clear, take_rating, take_persona, conversation,
          take_suggestions, choose_first_token, show: () => shown(current.said)};
})();
