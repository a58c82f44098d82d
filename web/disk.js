// What WanLite keeps on disk, in a line, and a button that clears it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { gib, listed } from "./words.js";

const FRESH = 3000; // milliseconds for which an answer serves all nodes: the server walks through its folders for it

const CLEARED = "wanlite.cleared"; // told to every panel

let asked = null;

/** The server's answer as an object, or null where there is none. */
export const answerOf = (path, options) => api.fetchApi(path, options).then((response) => response.json()).catch(() => null);

function look() {
    if (!asked || Date.now() > asked.fresh) {
        asked = { fresh: Infinity, answer: answerOf("/wanlite/disk") };
        const own = asked;
        own.answer.then(() => { own.fresh = Date.now() + FRESH; });
    }
    return asked.answer;
}

/** Has `heard` called when something was cleared. */
export function onCleared(heard, options) {
    api.addEventListener(CLEARED, heard, options);
}

/** Fills the line: how much it is, and "Clear". */
export async function showDisk(line, say) {
    const disk = await look();
    if (!disk?.runs) return;
    const button = document.createElement("button");
    button.className = "wanlite-clear";
    button.textContent = say("clear");
    button.title = say("clearTip");
    button.onclick = () => clear(say);
    const sizes = { runs: gib(disk.runs.bytes), answers: gib(disk.cache.bytes), starts: gib(disk.starts.bytes), free: gib(disk.free) };
    const told = document.createElement("span");
    told.textContent = told.title = say("disk", sizes);
    line.replaceChildren(told, button);
}

async function clear(say) {
    const toast = (severity, summary, detail) => app.extensionManager.toast.add({ severity, summary, detail, life: 10_000 });
    const disk = await answerOf("/wanlite/disk?lost=1");
    if (!disk?.runs) return toast("warn", say("clearTitle"), say("lost"));
    const sure = await app.extensionManager.dialog.confirm({
        type: "delete", title: say("clearTitle"),
        message: say("clearMessage", { size: gib(disk.runs.bytes + disk.cache.bytes + disk.starts.bytes) }),
        itemList: [...listed(say, "unsaved", disk.unsaved), ...listed(say, "unfinished", disk.unfinished)] });
    if (!sure) return;
    const answer = await answerOf("/wanlite/disk/clear", { method: "POST" });
    asked = null;
    if (!answer?.kept) toast("warn", say("clearTitle"), answer?.error ?? say("lost"));
    else toast("success", say("cleared", { size: gib(answer.freed) }), answer.kept.map(({ name, why }) => `${name}: ${why}`).join("\n"));
    api.dispatchEvent(new CustomEvent(CLEARED));
}
