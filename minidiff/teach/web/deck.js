// Cuts the slides of #source into pages that a screen of 1280 by 720 shows whole, and hands them to reveal.js.
const WIDE = 1180, HIGH = 640; // room of a page
const LARGER = [34, 31]; // where there is room: the size of text, else 28
const SPLIT = { UL: "li", OL: "li", TABLE: "tr" };

function fits(page) { return page.scrollHeight <= HIGH + 36; }

// The blocks of a slide, one below the other: what may stand on a page by itself.
function blocks(section) {
    const found = [];
    const add = (node, fragment) => {
        if (node.nodeType === 3) {
            if (!node.textContent.trim()) return;
            const p = document.createElement("p");
            p.append(node.cloneNode());
            node = p;
        }
        if (node.nodeType !== 1 || node.tagName === "SCRIPT" && !node.type.startsWith("math/")) return;
        const inside = fragment || node.classList.contains("fragment") || node.matches(".idea");
        if (node.tagName === "DETAILS") { // the answer comes with the next key
            const summary = node.querySelector("summary"), question = document.createElement("p");
            question.append(...summary.childNodes);
            summary.remove();
            if (question.textContent.trim() !== "Answer") add(question, inside);
            found.filter(each => !each.matches(".code, aside")).at(-1)?.classList.add("keep");
            [...node.childNodes].forEach(each => add(each, true));
        } else if (node.tagName === "DIV" && !node.matches(".code, .idea, .MathJax_Display")) {
            [...node.childNodes].forEach(each => add(each, inside));
        } else {
            if (inside) node.classList.add("fragment");
            found.push(node);
        }
    };
    [...section.childNodes].forEach(each => add(each, false));
    return found;
}

// The first part of a list, a table or a text that fits on the page, and the rest; nothing if no part fits.
function split(block, page) {
    const items = block.tagName === "PRE" ? block.innerHTML.split("\n")
        : SPLIT[block.tagName] ? [...block.querySelectorAll(SPLIT[block.tagName])] : [];
    const part = (from, to) => {
        const copy = block.cloneNode(false);
        if (block.tagName === "PRE") copy.innerHTML = items.slice(from, to).join("\n");
        else {
            const head = block.querySelector("thead");
            if (head && from > 0) copy.append(head.cloneNode(true));
            copy.append(...items.slice(from, to).map(item => item.cloneNode(true)));
            if (block.tagName === "OL") copy.start = (block.start || 1) + from;
        }
        return copy;
    };
    let kept = 0;
    for (let n = 1; n < items.length; n++) {
        const first = part(0, n);
        page.append(first);
        const good = fits(page);
        first.remove();
        if (!good) break;
        kept = n;
    }
    return kept ? [part(0, kept), part(kept, items.length)] : [];
}

// A figure as large as the page has room for, less what is kept free. False if that is too small to be seen well.
function enlarge(figure, page, free) {
    const images = [...figure.querySelectorAll("img")];
    const wide = Math.max(...images.map(i => i.naturalWidth)), high = images.reduce((sum, i) => sum + i.naturalHeight, 0);
    const alone = Math.min(WIDE / wide, (HIGH - 80 - free) / high);
    figure.remove();
    const room = HIGH + 36 - free - Math.max(page.scrollHeight, 36) - 14 - 4 * images.length;
    const scale = Math.min(WIDE / wide, room / high);
    for (const image of images) {
        image.removeAttribute("height");
        image.width = Math.floor(image.naturalWidth * Math.min(scale, alone));
    }
    page.append(figure);
    return scale >= 0.7 * alone;
}

// Formulas that are too wide: those that stand side by side come below each other.
async function stackFormulas(source) {
    for (const formula of MathJax.Hub.getAllJax(source)) {
        const shown = document.getElementById(`${formula.inputID}-Frame`), parts = formula.originalText.split("\\qquad");
        if (parts.length < 2 || shown.getBoundingClientRect().width <= WIDE) continue;
        const tag = (formula.originalText.match(/\\tag\{[^}]*\}/) || [""])[0];
        const lines = parts.map(part => part.replace(tag, "")).join(" \\\\[4pt] ");
        const text = `\\begin{gathered} ${lines} \\end{gathered} ${tag}`;
        await new Promise(done => MathJax.Hub.Queue(["Text", formula, text], done));
    }
}

// A formula that is still too wide becomes smaller.
function narrow(block) {
    for (const formula of block.querySelectorAll(".MathJax_Display > .MathJax")) {
        const wide = formula.getBoundingClientRect().width;
        if (wide > WIDE) formula.style.fontSize = `${Math.floor(100 * WIDE / wide)}%`;
    }
}

const HEADING = /^H[1-4]$/;

function paginate(section, measure, before) {
    const queue = blocks(section), free = section.querySelector(".idea") ? 120 : 0; // room for the idea at the end
    const notes = [...section.querySelectorAll("aside.notes")], pages = [];
    let page, title = before;
    const seen = () => [...page.children].some(block => !block.matches(".code, .running"));
    const turn = () => { // a new page; headings and questions do not stay behind alone
        const kept = [];
        const others = page && [...page.children].some(each => !each.matches(".running, .code, .keep, h1, h2, h3, h4"));
        while (others && page.children.length > 1 && (HEADING.test(page.lastElementChild.tagName)
                                                    || page.lastElementChild.matches(".keep"))) {
            kept.unshift(page.lastElementChild);
            page.lastElementChild.remove();
        }
        page = document.createElement("div");
        page.className = "page";
        measure.replaceChildren(page);
        if (!HEADING.test((kept[0] || queue.find(each => !each.matches(".code, aside")) || page).tagName) && title) {
            const running = document.createElement("p");
            running.className = "running";
            running.innerHTML = title.innerHTML;
            page.append(running);
        }
        page.append(...kept);
        pages.push(page);
    };
    turn();
    while (queue.length) {
        const block = queue.shift();
        if (block.matches("aside.notes")) continue;
        page.append(block);
        narrow(block);
        if (HEADING.test(block.tagName)) title = block;
        const good = block.querySelector("img") ? enlarge(block, page, free) : fits(page);
        if (good) continue;
        const alone = ![...page.children].some(other => other !== block && !other.matches(".code, .running, h1, h2, h3, h4"));
        block.remove();
        const parts = split(block, page);
        if (parts.length) {
            page.append(parts[0]);
            queue.unshift(parts[1]);
        } else if (alone) {
            page.append(block);
            page.dataset.full = "true";
            continue;
        } else queue.unshift(block);
        turn();
    }
    return [title, pages.filter((each, place) => {
        page = each;
        if (seen()) return true;
        const next = pages[place + 1] || pages[place - 1]; // code alone goes with what follows
        if (next) next.prepend(...[...each.children].filter(block => block.matches(".code")));
        return false;
    }).map((each, place) => {
        measure.replaceChildren(each);
        if (!each.querySelector("img")) LARGER.some(size => {
            each.style.fontSize = `${size}px`;
            return fits(each) && each.scrollWidth <= 1280 || (each.style.fontSize = "", false);
        });
        const slide = document.createElement("section");
        slide.append(each, ...(place === 0 ? notes : []));
        return slide;
    })];
}

function asFragments(section) { // of the projector's cell: its pictures row by row, then what it prints, then its idea
    const idea = section.querySelector(".idea");
    if (!idea) return;
    section.querySelectorAll(".fragment").forEach(each => each.classList.remove("fragment"));
    for (const each of section.querySelectorAll("figure img, .output pre, :scope > p, :scope > ul, :scope > ol"))
        each.classList.add("fragment");
    section.append(...section.querySelectorAll(":scope > .output:has(> pre)"), idea);
}

function showCode() {
    const dialog = document.querySelector("dialog");
    if (dialog.open) return dialog.close();
    const code = Reveal.getCurrentSlide().querySelectorAll(".code");
    dialog.replaceChildren(...[...code].map(each => each.cloneNode(true)));
    const hint = document.createElement("p");
    hint.textContent = code.length ? "C closes the code." : "This slide has no code. C closes this.";
    dialog.append(hint);
    dialog.showModal();
}

async function start() {
    const source = document.getElementById("source");
    await Promise.all([...source.querySelectorAll("img")].map(image => image.decode().catch(() => {})));
    await new Promise(done => MathJax.Hub.Queue(["Typeset", MathJax.Hub, source], done));
    await stackFormulas(source);
    const measure = document.createElement("div"), slides = document.querySelector(".slides");
    source.before(measure);
    for (const stack of source.children) {
        const whole = document.createElement("section");
        let title = null;
        for (const section of stack.children) {
            asFragments(section);
            const [last, slides] = paginate(section, measure, title);
            title = last;
            whole.append(...slides);
        }
        if (whole.children.length) slides.append(whole);
    }
    measure.remove();
    source.remove();
    const dialog = document.createElement("dialog");
    document.body.append(dialog);
    await Reveal.initialize({ width: 1280, height: 720, margin: 0, minScale: 0.1, maxScale: 8, center: false, hash: true,
        slideNumber: "c/t", transition: "none", navigationMode: "linear", plugins: [RevealNotes],
        keyboardCondition: event => !dialog.open || !["ArrowUp", "ArrowDown"].includes(event.key) }); // these scroll it
    Reveal.addKeyBinding({ keyCode: 67, key: "C", description: "Show the code" }, showCode);
    for (const moved of ["slidechanged", "fragmentshown", "fragmenthidden"]) Reveal.on(moved, () => dialog.close());
    document.documentElement.dataset.ready = "true";
}
MathJax.Hub.Register.StartupHook("End", start);
